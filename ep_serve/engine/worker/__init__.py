"""Worker and scheduler: worker classes, the scheduler, and the guard of grammars."""
