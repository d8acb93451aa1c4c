"""Everything around the three scripts: the embedded model, NATS and etcd, and `make run`.

The scripts import nothing from here. They can be started by hand, as the chapter does it.
"""
