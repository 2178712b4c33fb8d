"""The plugin ``acme-0-1-placement`` for arctic-plugins."""
