"""What lies on disk: configurations, weight names, and the checkpoints this project can make.

Nothing is imported here, so that `sections` and `errors` stay cheap to import. The parts:

- `config`: the configuration classes and `ReductionConfig`
- `names`: which tensors a checkpoint has to hold, with their shapes
- `tensors`: reading and writing safetensors files piece by piece
- `check`, `init`, `embedded`: the `ep-serve checkpoint` subcommands
"""
