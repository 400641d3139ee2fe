"""What was found and what was watched: the findings file, the terminal, JSON, SARIF, annotations."""
