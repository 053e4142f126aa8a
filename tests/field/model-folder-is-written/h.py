import os


class H:
    def initialize(self, context):
        d = context.system_properties["model_dir"]
        os.replace(os.path.join(d, "weights.part"), os.path.join(d, "weights.bin"))

    def handle(self, data, context):
        return [open("labels.txt").read() + open("weights.bin").read()] * len(data)
