"""What the commands of `lbdt.cli` do, one module each; every `run` returns values for JSON and lines of text."""
