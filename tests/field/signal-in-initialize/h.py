import signal


class H:
    def initialize(self, context):
        signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "got", True))
        self.got = False

    def handle(self, data, context):
        import os
        import time
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)
        return [str(self.got)] * len(data)
