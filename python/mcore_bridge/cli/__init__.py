"""The command line: pt, sft, export, verify, inspect."""
