"""The demonstration: gptj's own commands in a row, on the standard library's source text."""
