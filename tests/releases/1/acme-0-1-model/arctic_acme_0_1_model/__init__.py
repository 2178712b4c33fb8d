"""The plugin ``acme-0-1-model`` for arctic-plugins."""
