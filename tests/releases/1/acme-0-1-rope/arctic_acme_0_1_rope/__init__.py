"""The plugin ``acme-0-1-rope`` for arctic-plugins."""
