"""Every private attribute of Lightning and torch that we touch, one module each; tests fail loudly where a version lacks one."""
