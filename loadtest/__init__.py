"""Load tests of servers that answer questions about clips: `python -m loadtest --help`.

The parts, each importable:

- `scenario`: which requests are sent, and when; `clips`: the clips in them
- `driver`: sends them and notes when every piece of an answer came
- `monitor`: what the server says about itself meanwhile, and the memory of its processes
- `measures`: the field's figures from that: TTFT, ITL, TPOT, goodput, rates
- `targets`: the servers to compare, started and stopped here or running elsewhere
- `campaign`, `search`: rounds over targets and loads; the largest load that meets a service level
- `report`, `plots`, `compare`: what is left to read
- `shapes`, `reference`: what the arithmetic allows, and a checkpoint of a realistic shape
"""
