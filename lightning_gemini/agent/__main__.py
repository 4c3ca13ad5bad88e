from lightning_gemini.agent.main import main

raise SystemExit(main())
