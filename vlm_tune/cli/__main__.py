"""`python -m vlm_tune.cli`, as launchers of several processes start it."""

from vlm_tune.cli.entry import main

main()
