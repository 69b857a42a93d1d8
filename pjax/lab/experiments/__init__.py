"""Experiments as files: what is trained or measured, and what is made of it.

Each TOML file of this folder is one; `pjax experiment run` takes their names, and files of the same
form that lie elsewhere. `definition` reads them, `measures` holds what they measure beside
accuracies, `running` carries them out and writes what they found, `figures` draws it.
"""
