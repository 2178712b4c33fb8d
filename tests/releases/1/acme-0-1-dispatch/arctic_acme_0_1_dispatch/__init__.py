"""The plugin ``acme-0-1-dispatch`` for arctic-plugins."""
