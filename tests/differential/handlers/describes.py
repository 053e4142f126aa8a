class Handler:
    def initialize(self, context):
        self.context = context

    def handle(self, data, context):
        return [{"described": True, "data": repr(data), "describe": context.get_request_header(0, "describe")}]
