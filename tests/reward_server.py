"""A reward over HTTP, as a process: python reward_server.py PORT [LAST].

It replies what `online_rewards.letters` gives, in reverse, and a line with the
number of texts to each request; SIGKILL is its reply to request LAST.
"""

import http.server
import json
import os
import signal
import sys

import online_rewards


class Handler(http.server.BaseHTTPRequestHandler):

  def do_POST(self):
    asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    print(len(asked["ids"]), flush=True)
    SEEN.append(asked)
    if sys.argv[2:] == [str(len(SEEN))]:
      os.kill(os.getpid(), signal.SIGKILL)
    scores = online_rewards.letters(asked["prompts"], asked["completions"])
    reply = {"ids": asked["ids"][::-1], "scores": scores[::-1]}
    self.send_response(200)
    self.end_headers()
    self.wfile.write(json.dumps(reply).encode())

  def log_message(self, *words):
    pass


SEEN = []

if __name__ == "__main__":
  http.server.HTTPServer(
      ("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
