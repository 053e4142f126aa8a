#!/bin/sh
# What a container runs: pyserve with the arguments, or another command that the image has.
#
#   docker run pyserve start --foreground ...      pyserve's commands and flags
#   docker run pyserve torchserve --start ...      TorchServe's commands, as its images take them
#   docker run -it pyserve sh
set -e
case "$1" in
    torchserve|torch-model-archiver|pyserve|python|python3|sh|bash) exec "$@" ;;
    serve) shift; exec pyserve start --foreground "$@" ;;  # as SageMaker and TorchServe's images are started
    /*) exec "$@" ;;
    *) exec pyserve "$@" ;;
esac
