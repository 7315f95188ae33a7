"""What only a GPU can show, measured in at most six minutes: `make gpu`.

`sections.py` lists the sections, `runner.py` runs each as a child process under a time limit of its
own, `child.py` is such a process, and `report.py` draws the tables. Every section has a module.
"""
