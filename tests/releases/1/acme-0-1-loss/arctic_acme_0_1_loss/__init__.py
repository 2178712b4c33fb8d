"""The plugin ``acme-0-1-loss`` for arctic-plugins."""
