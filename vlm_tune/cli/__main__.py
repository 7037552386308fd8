"""Entry point of `python -m vlm_tune.cli`, which launchers of several processes start."""

from vlm_tune.cli.entry import main

main()
