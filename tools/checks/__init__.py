"""Long checks: every architecture, kills and resumes, the procedure of the paper's authors."""
