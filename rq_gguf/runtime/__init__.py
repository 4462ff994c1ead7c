"""The runtime: fetch llama.cpp, patch it, build it, say where it is, run its programs, pack it for Python.

The modules, in the order of the work: fetch, patch, build, installation (all three), tools, wheel, doctor. What others call:
installation.install, tools.tool_path, tools.library_path, tools.source_path, tools.run_tool, wheel.make_wheel, doctor.diagnose.
"""
