"""The whole federation in one process, in virtual time, from one seed."""
