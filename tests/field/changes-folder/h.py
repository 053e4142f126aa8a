import os


class H:
    def initialize(self, context):
        self.dir = context.system_properties["model_dir"]

    def handle(self, data, context):
        before = os.path.samefile(os.getcwd(), self.dir)
        os.chdir("/")
        return [str(before)] * len(data)
