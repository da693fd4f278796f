"""What stands in front of one or many engines: an OpenAI-compatible gateway.

It imports no other room, no torch and no vLLM, so that its image stays small.
"""
