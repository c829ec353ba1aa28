"""Our loader in other people's trainers: a module for each peer, which is imported when it is asked for.

In: a `Loader`. Out: what the peer's trainer takes for its data, with the loader's order and exact resume. No peer is a
dependency of ours: whoever uses a module has its peer installed.
"""
