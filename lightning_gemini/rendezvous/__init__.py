"""Process groups that can be re-formed under the objects that hold them, without a TCPStore."""
