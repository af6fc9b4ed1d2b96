"Commands of cpcl in the process of a test."

import contextlib, io

from cpcl.cli import main


def cpcl(*words):
    "(exit status, stdout, stderr) of a command that runs in this process."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(w) for w in words])
        except SystemExit as e:
            code = e.code or 0
    return code, out.getvalue(), err.getvalue()
