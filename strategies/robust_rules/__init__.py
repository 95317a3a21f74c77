"""The rules that look at each update by itself, so that one site cannot pull the result where it likes."""
