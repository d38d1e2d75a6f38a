"""What stands between HTTP and the scheduler: OpenAI's requests, tools, answers, and the threads."""
