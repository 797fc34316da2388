"""The CPU: its instructions, threads and working memory."""
