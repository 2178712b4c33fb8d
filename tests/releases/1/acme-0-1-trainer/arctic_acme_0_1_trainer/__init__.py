"""The plugin ``acme-0-1-trainer`` for arctic-plugins."""
