"""The command line: `python -m jaxloop` and the script `jaxloop`, one module for each command."""
