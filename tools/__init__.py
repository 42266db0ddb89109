"""The parts that the commands in this folder are made of, as one package: `itop_prune_tools`."""
