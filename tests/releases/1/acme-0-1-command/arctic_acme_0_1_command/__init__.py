"""The plugin ``acme-0-1-command`` for arctic-plugins."""
