def handle(data, context):
    if data is None:
        return None
    with open("seen.txt", "a") as file:
        file.write("x")
    return [open("seen.txt").read()] * len(data)
