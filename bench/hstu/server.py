"""The server that is measured, and a client that adds as little as it can to its times."""
import json
import socket
import subprocess
import time


class Connection:
    """One kept-open connection of HTTP/1.1: a request is one write, an answer is read up to its length."""

    def __init__(self, address):
        self.address = address
        self.socket = None
        self.open()

    def open(self):
        if self.socket:
            self.socket.close()
        self.socket = socket.create_connection(self.address, timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.used = time.monotonic()

    def exchange(self, request):
        """The status and the body of the answer."""
        self.socket.sendall(request)
        answer = bytearray()
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer += self.receive()
        head = answer[:end].decode("latin-1").lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in head if line.startswith("content-length:"))
        while len(answer) < end + 4 + length:
            answer += self.receive()
        self.used = time.monotonic()
        return int(head[0].split()[1]), bytes(answer[end + 4 :])

    def receive(self):
        part = self.socket.recv(1 << 20)
        if not part:
            raise ConnectionError("the server closed the connection")
        return part

    def close(self):
        self.socket.close()


class Server:
    def __init__(self, binary, checkpoint, arguments):
        command = [binary, "serve", "--checkpoint", str(checkpoint), "--listen", "127.0.0.1:0", *arguments]
        self.command = " ".join(["beamline", "serve", "--checkpoint", "DIR", *command[4:]])
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self.process.stdout.readline()
        if not line.startswith("listening on http://"):
            raise SystemExit(f"the server did not start: {line!r}; {self.command}")
        host, port = line.strip().removeprefix("listening on http://").rsplit(":", 1)
        self.host = f"{host}:{port}"
        self.connection = Connection((host, int(port)))
        deadline = time.monotonic() + 60
        while not self.ready():
            if time.monotonic() > deadline:
                raise SystemExit("the server does not get ready")
            time.sleep(0.05)

    def ready(self):
        request = f"GET /readyz HTTP/1.1\r\nhost: {self.host}\r\n\r\n"
        return self.connection.exchange(request.encode())[0] == 200

    def post(self, path, request):
        """Milliseconds from sending to the last byte, and the answer."""
        body = json.dumps(request).encode()
        head = (f"POST {path} HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n")
        request = head.encode() + body
        if time.monotonic() - self.connection.used > 5:
            # An idle connection may have been closed: it is opened again before the clock starts.
            self.connection.open()
            self.ready()
        start = time.perf_counter()
        status, answer = self.connection.exchange(request)
        took = 1e3 * (time.perf_counter() - start)
        if status != 200:
            raise SystemExit(f"{path}: {status} {answer[:500]!r}")
        return took, json.loads(answer)

    def stop(self):
        self.connection.close()
        self.process.terminate()
        self.process.wait()
