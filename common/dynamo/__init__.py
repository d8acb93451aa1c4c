"""The chapter's words on Dynamo's runtime: connections, and calls that survive instance failure."""
