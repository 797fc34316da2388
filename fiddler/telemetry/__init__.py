"""What a step spends its time on, and which experts it chose."""
