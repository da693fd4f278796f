"""Load tests of multimodal servers with video clips: `python -m loadtest --help`.

The parts, each importable:

- `scenario`: which requests are sent, and when; `clips`: the clips in them
- `driver`: sends them and records when each chunk of an answer arrives
- `monitor`: samples the server's metrics and the memory of its processes
- `measures`: figures of a run: TTFT, ITL, TPOT, goodput, rates
- `targets`: the servers to compare, started here or remote
- `campaign`, `search`: rounds over targets and loads; the largest load that meets a service level
- `report`, `plots`, `compare`: tables, plots and ratios of reports
- `shapes`, `reference`: analytical bounds, and checkpoints of realistic shapes
"""
