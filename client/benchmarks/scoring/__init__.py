"""Each benchmark's own arithmetic, from judged rows to its official numbers. Knows no files, network or terminal."""
