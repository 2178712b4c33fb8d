"""``arctic bench``: loads for a server, their measurement, and reports. Importing this package loads no host."""
