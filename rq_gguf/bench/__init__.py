"""Speed of files on llama.cpp's own programs, side by side."""
