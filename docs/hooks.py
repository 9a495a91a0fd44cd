"""Hooks of the documentation site. `mkdocs.yml` names this file."""
