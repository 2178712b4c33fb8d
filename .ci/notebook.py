"""Run the notebook given and store its outputs in it: `make notebook`.

Left out, because they depend on the machine: what libraries log to standard error, and times.
"""

import sys

import nbformat
from arctic_plugins_huggingface.cli import quiet_hosts
from nbclient import NotebookClient

path = sys.argv[1]
quiet_hosts()  # environment variables, for the kernel
notebook = nbformat.read(path, as_version=4)
NotebookClient(notebook, timeout=600, record_timing=False).execute()
for cell in notebook.cells:
    if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
nbformat.write(notebook, path)
