"""What happened, when: events, timelines, reports."""
