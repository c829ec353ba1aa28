"""Our loader in other people's trainers: one module for each peer, imported when it is needed.

In: a `Loader`. Out: what the peer's trainer takes as its data, with the loader's order and exact resume. No peer is a
dependency of ours: to use a module, install its peer.
"""
