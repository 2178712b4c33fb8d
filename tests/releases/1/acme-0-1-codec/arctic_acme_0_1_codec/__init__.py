"""The plugin ``acme-0-1-codec`` for arctic-plugins."""
