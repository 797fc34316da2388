"""The HTTP server: routes of OpenAI's, Anthropic's and llama.cpp's protocols over one worker. Knows no kernels."""
