"""An OpenAI-compatible gateway for one or many engines.

It imports only `ep_serve.contract`, neither torch nor vLLM, so that its image stays small.
"""
