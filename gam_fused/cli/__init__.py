"""The command line: ``gam-fused info``, ``gam-fused train`` and ``gam-fused compare``.

Needs the ``cli`` extra (``pip install "gam-fused[cli]"``); the library itself never imports this package.
"""
