"""The inside of a worker process: find the handler, call it, turn results and failures into answers.

Never imports the server's side.
"""
